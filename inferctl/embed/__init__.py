"""Embeds files of any length without a server: ranges of rows become shards, and a killed run continues."""
