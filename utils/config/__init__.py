"""Configuration: schema, YAML files, command line."""
