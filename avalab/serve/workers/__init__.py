"""The processes that compute: one model each, spoken to over a socket, so that one may die without the others."""
