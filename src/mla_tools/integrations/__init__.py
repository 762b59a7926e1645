"""Other people's programs that use this package."""
