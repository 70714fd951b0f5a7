"""A cache of what the frozen prefix of a model computes."""

from .cache import FeatureCache

__all__ = ["FeatureCache"]
