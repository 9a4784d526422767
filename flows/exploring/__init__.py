"""``memory3 explore``: a page that looks into a bank, served beside the API."""
