"""What a run is, and what it leaves: records, artefacts, caches, statistics, processes."""
