"""Errors a user can cause. Each message says what is wrong, what we got, what is allowed and what to do."""


class TokError(Exception):
    """Base of every error tok1d raises on user input; the command line prints it as one line and exits 1."""


class UsageError(TokError):
    """The request itself is malformed (a bad flag or argument value); the command line exits 2."""


class TokFileError(TokError):
    """A .tok (or jsonl/npz/safetensors token) file is truncated, damaged or not ours."""


class ImageError(TokError):
    """An image cannot be read, has an unsupported form, or has a size the model cannot take."""


class ModelError(TokError):
    """A model name, folder, configuration or weight file cannot be used."""


class TokenError(TokError):
    """Token ids, bits or counts do not fit the model they are given to."""


class MissingExtraError(TokError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""
