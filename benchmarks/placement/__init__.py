"""Where DeepCache's compute calls lie: the automatic schedule beside the uniform one."""
