"""Where does a flag's value come from: the command line, the environment, the config file, or its default?"""
