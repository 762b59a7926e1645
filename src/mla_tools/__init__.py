"""mla-tools."""
