"""Several API processes in front of one backend: the frames between them, and who starts and watches them."""
