"""A model that plans, calls tools, reads documents and remembers, within limits that a person set."""
