"""The way out: folders of the formats that others load, each proved by loading it back before it appears."""
