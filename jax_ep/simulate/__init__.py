"""A model of dispatch and combine across nodes; it predicts, nothing is measured."""
