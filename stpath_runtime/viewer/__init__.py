"""Looking at predictions: any gene over the tissue, and what is different in a region, in a browser or in Python."""
