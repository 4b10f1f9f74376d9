"""Files and batches of OpenAI's API on the server's disk, and the process that sends the lines of batches."""
