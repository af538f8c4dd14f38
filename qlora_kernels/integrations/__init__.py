"""Where the engine meets other libraries. Each module needs the library that it is named for."""
