"""What is in one device's memory: backends, segments, the worker-local store. Knows nothing of Kafka or Dask."""
