"""What the environment needs beyond ``pip install``: the torchvision import hook for CPU machines."""
