"""What is said of the HTTP surface: the OpenAPI document, and the page made from it."""
