"""How records come in and how they get stuck: Kafka sources and producers, record codecs, offsets, dead letters."""
