"""The shared space of pictures and sentences, and the Library that users hold."""
