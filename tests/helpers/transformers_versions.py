"""The versions of transformers that the integration is tried with, each in an environment of its own.

An environment has `transformers==VERSION` with what it asks for, and the rest of requirements/dev.txt;
tests/integrations/test_transformers*.py run in it.
"""

VERSIONS = ("4.48.3", "4.51.3", "4.57.6", "5.0.0", "5.3.0", "5.10.4", "5.24.0")
