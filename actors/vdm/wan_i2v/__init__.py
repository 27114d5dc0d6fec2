"""What Wan's image-to-video models do otherwise than Wan's.

For: the condition in channels beside the noise, the image that cross-attention sees, what both cost.
Not for: what they share with Wan's, whose subclasses they are.
Begin with ``family``.
"""
