"""Documents become pieces in one file of sqlite, found by words and by meaning, and cited in answers."""
