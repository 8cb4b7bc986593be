"""What the product does: ingest graph, encoders, routing, the clients, configuration and the command line."""
