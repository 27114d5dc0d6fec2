"""Pure scoring functions: text and frames in, numbers out. No Ray, no pipeline import."""
