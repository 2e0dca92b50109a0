"""``macs report``: recorded traffic, and what would be won on it, as one page."""
