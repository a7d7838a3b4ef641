"""Imported from the root of the repository, as tests.FOLDER.MODULE."""
