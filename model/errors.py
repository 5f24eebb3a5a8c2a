"""What can be wrong with a checkpoint. Its reader is the operator, so messages name files and tensors.

ModelError
├── ConfigError       config.json, generation_config.json: missing, malformed or beyond what we honour
└── CheckpointError   weights: a tensor missing, unexpected, stored twice or of the wrong shape
"""


class ModelError(Exception):
    """The checkpoint cannot be served; the message says what to mend."""


class ConfigError(ModelError):
    """A configuration file is missing, malformed or asks for what this server cannot honour."""


class CheckpointError(ModelError):
    """The weights on disk are not exactly the tensors that the configuration calls for."""
