"""Growing a trained network without a change of what it computes."""

from funcnets.growth.grow import grow

__all__ = ["grow"]
