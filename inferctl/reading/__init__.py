"""What the files of a model folder say: architecture, modules, heads, outputs, prompts and templates. Without torch."""
