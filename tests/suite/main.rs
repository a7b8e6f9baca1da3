mod model;
mod objectives;
mod tiny;
