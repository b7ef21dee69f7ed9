"""Raw records to documents to token shards: reading, extraction, language, filters, packing."""
