"""``memory3 report``: a version of a bank as figures, and these as one HTML file."""
