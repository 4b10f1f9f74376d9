"""What all rooms share and nobody reads for its own sake: errors, YAML documents, output files, sizes, addresses."""
