"""recattn in other people's models; a module needs the library that it is named after."""
