"""What was uploaded: models, their immutable versions, uploads and built artifacts."""
