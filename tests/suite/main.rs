mod objectives;
