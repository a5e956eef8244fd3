"""HTTP: identity, schemas, routes, the guarded engine, command line."""
