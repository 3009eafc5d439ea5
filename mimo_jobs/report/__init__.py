"""``nemo-run report``: a run as one HTML page that asks nothing of the network."""
