"""Reports: HTML pages with charts."""
