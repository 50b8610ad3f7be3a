"""Records become tables, figures and pages."""
