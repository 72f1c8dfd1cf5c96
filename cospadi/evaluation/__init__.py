"""Room 6: how good a model still is. Dense and compressed models go through the same function."""
