"""What every operator shares on the host: dispatch, validation, tuning, kept weights, libraries."""
