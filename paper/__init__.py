"""The paper in miniature: variants, one command for every row, claims, and the report."""
