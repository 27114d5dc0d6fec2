"""Bring other people's videos into the dataset format: VANS CSVs, plain manifests, cuts of long videos."""
