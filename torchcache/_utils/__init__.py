"""What has nothing to do with caching: the logger, fork-safe locks, lazy attributes."""
