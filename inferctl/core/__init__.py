"""What all rooms share: errors, YAML documents, output files, sizes, addresses."""
