"""What a user hands in: slides, context, and the names of genes, organs and technologies."""
