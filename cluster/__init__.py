"""Who holds what, and who is alive: placement, the Dask plugins, the calls between workers."""
