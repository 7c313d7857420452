"""Key/value caches of the three branches: storage and incremental compression, no policy."""

from nsa.cache.layer_cache import CachedKV, LayerCache, TokenKV
from nsa.cache.nsa_cache import NSACache

__all__ = ["CachedKV", "LayerCache", "NSACache", "TokenKV"]
