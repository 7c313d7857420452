"""Key/value caches of the three branches: storage and incremental compression, no policy."""
