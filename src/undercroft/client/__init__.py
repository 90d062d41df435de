"""The typed client of the API, and the light transport beneath it.

Nothing is imported here, so that a command that only lists can do without the models:
`undercroft.client.raw` for plain dicts, `undercroft.client.client` for typed objects.
"""
